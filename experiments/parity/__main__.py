"""`python -m experiments.parity`"""

import sys

from experiments.parity import main

sys.exit(main())
