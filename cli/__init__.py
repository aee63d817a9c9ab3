"""The `weightbus` command: thin, one file per command, loaded only when it is called."""
