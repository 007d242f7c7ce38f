"""The command line: flags -> config -> one library call, a module a command."""
