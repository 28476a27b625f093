"""Speech: audio files as samples, samples as what an encoder reads, and the prompt that its decoder begins with."""
