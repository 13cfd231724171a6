"""Other tools' HuBERT files, and our own: what they hold, read and written without those tools."""
