"""Microsoft Olive's configuration files, translated at the edge; see docs/olive.md."""
