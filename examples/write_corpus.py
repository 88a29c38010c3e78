"""Write the text of the model that ships: this Python's standard library, and the held-out sample.

    python examples/write_corpus.py corpus --tests

gives corpus/train.txt, corpus/heldout.txt and corpus/corpus.json (Python version, sizes, sha256).
The held-out file is the sample inside the package; no file of its names is in the training text.
"""

import argparse
import json

from weightshare.data import write_corpus

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", help="where to write")
parser.add_argument("--root", help="another standard library than the running Python's")
parser.add_argument("--tests", action="store_true", help="with the library's tests: 3 x the text")
arguments = parser.parse_args()
facts = write_corpus(arguments.folder, arguments.root, tests=arguments.tests)
print(json.dumps(facts, indent=1))
