"""``gradfast data``: data sets made and checked before anything is trained on them.

The modules::

    texture     ground that looks like the photographs and shows nothing
    compose     photographs placed on it, with boxes known to the pixel
    scenes      a data set of such scenes in COCO's format, written whole or not at all
    check       what the trainer would skip of a data set, and what it holds
    cli         the command line
"""
