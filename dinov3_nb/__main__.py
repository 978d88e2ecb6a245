"`python -m dinov3_nb train ...`, and `accelerate launch -m dinov3_nb train ...`."
import sys

from dinov3_nb.cli import main

sys.exit(main())
