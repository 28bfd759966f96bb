"""``python -m gradfast`` is the ``gradfast`` command."""

import sys

from gradfast.cli import main

sys.exit(main())
