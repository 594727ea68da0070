"""`python -m shardway` is the `shardway` command."""

import sys

from shardway.cli.main import main

sys.exit(main())
