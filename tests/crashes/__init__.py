"""Crashes and full disks at every file operation of every command."""
