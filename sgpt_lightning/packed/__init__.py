"""Modules that keep their weight packed in memory."""
