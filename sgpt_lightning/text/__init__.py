"""Text -> windows of tokens, with the protocol that says how they were made."""
