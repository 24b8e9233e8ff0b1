"""What a judge, any model behind an OpenAI-compatible endpoint, says of answers, and the win rates that follow."""
