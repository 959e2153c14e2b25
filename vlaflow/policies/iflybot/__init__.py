"""iFlyBot-VLA."""
