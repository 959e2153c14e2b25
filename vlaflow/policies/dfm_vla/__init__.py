"""DFM-VLA: discrete flow matching over action tokens, every token revisable at every step."""
