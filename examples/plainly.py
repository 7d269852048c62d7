"""What goes wrong for the user of an example is told in one line, with the way to go on; not as a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pictures import PicturesError

from modsurg.errors import ModsurgError

EXTRAS = {"torchvision": "vision", "PIL": "vision", "sklearn": "vision", "tensorboard": "tensorboard"}


@contextmanager
def told_plainly() -> Iterator[None]:
    """End the script with one line for errors that are the user's to mend.

    Raises:
        SystemExit: With that line, which Python prints; the exit status is 1, that of Ctrl-C 130.
    """
    script = Path(sys.argv[0]).name
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        raise SystemExit(f'{script}: it needs {error.name}: pip install "modsurg[{EXTRAS[error.name]}]"') from None
    except (PicturesError, ModsurgError, OSError) as error:
        raise SystemExit(f"{script}: {' '.join(str(error).split())}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
