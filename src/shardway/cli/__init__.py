"""The command line: arguments, progress, tables, exit codes. Nothing is decided here."""
