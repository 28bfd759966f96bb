"""``python -m gradfast.train`` is ``gradfast train``."""

import sys

from gradfast.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
