"""`python -m sgpt_lightning` is `sgpt`."""

from sgpt_lightning.cli import main

if __name__ == "__main__":
    main()
