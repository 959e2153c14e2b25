"""Networks that move suffix tokens: the backbone's own layers (``shared``) or a separate expert."""
