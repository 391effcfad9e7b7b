"""generate.py BUNDLE PROMPT OUT.png: one image, with a line for every grid row."""

import sys

from ssd_export import ImageGenerator

bundle, prompt, out = sys.argv[1:]
with ImageGenerator.from_bundle(bundle) as generator:
    for event in generator.stream([prompt], seed=0):
        print(f"\rrow {event.row + 1}", end="", file=sys.stderr)
    event.images[0].save(out)
print(f"\r{out}", file=sys.stderr)
