"""Speech: models that transcribe audio."""
