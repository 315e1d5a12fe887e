"""Check shards. See `python tools/verify_shards.py --help`."""

import argparse
import sys

from headrace.shards.errors import UserError
from headrace.shards.local import local
from headrace.shards.terminal import print_any_name
from headrace.shards.verify import verify, written_directories
from headrace.tools.arguments import positive

DESCRIPTION = """\
Check data sets that make_shards wrote: counts, the sha256 of every shard, the content hash of every
sample, and that every image decodes to its declared size. Exit code 0 if all is well, else 1.
"""
EXAMPLES = """\
examples:
  python tools/verify_shards.py data/imagenet              all splits in it
  python tools/verify_shards.py data/imagenet/val --no-decode
"""
PROBLEMS_SHOWN = 50


def main(arguments: list[str] | None = None) -> int:
    """Verify what the command line names; returns the exit code."""
    print_any_name()
    parser = argparse.ArgumentParser(
        "verify_shards.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", type=local, help="a data set, or several below")
    parser.add_argument(
        "--no-decode", action="store_true", help="check files, counts and sha256 only: reads once"
    )
    parser.add_argument("--workers", metavar="N", type=positive, help="default: one per core")
    options = parser.parse_args(arguments)
    sound = True
    try:
        for directory in written_directories(options.directory):
            result = verify(
                directory,
                decode=not options.no_decode,
                workers=options.workers,
                progress=True,
            )
            for problem in result.problems[:PROBLEMS_SHOWN]:
                print(problem)
            hidden = len(result.problems) - PROBLEMS_SHOWN
            if hidden > 0:
                print(f"... and {hidden} more")
            if result.problems:
                sound = False
                print(f"{directory}: {len(result.problems)} problem(s)")
                continue
            manifest = result.manifest
            how = "all decoded" if result.decoded else "not decoded"
            print(
                f"{directory}: OK, {manifest.samples:,} samples in {len(manifest.shards)} shard(s),"
                f" {len(manifest.classes)} classes, {how}"
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
