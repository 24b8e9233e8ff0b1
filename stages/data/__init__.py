"""Preference data and conversations: from rows of any shape to token ids."""
