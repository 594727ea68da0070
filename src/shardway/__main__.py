"""`python -m shardway` is the `shardway` command."""

from shardway.cli.main import program

program()
