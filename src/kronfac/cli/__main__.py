"""``python -m kronfac.cli``."""

from __future__ import annotations

from kronfac.cli.main import main

main()
