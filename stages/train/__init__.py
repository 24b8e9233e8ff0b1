"""Stage two: objectives, the trainer, and the other trainings (SFT, SAEs)."""
