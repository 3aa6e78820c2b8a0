"""Raw waveforms."""
