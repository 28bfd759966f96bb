"""Detection data in COCO's format: read and checked, split, drawn from, measured, and shown.

The modules, in the order in which a run meets them::

    categories, listing    the classes and their numbers; scenes and their boxes before any image is read
    check                  an annotation becomes a box or a sentence that says why not
    read, layout           one annotations file; a folder of them, in any of the usual arrangements
    split                  which scenes are held out, where the data does not say
    dataset                scenes by (seed, epoch, index), with the boxes turned as the images are
    metrics                COCO's twelve numbers, from several processes without counting a scene twice
    pictures               predictions drawn over the truth

COCO's format: Lin et al., "Microsoft COCO: Common objects in context", ECCV 2014, https://cocodataset.org/#format-data.
"""
