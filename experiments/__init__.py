"""The paper's claims, tested at the scale we can run: data, latents, plans, a driver, a summary.

    python -m experiments.images --all            # 1. images as tar files, from installed packages
    python -m experiments.latents --all           # 2. latents by three semantic encoders, and the judges
    python -m experiments.run quality --dry-run   # 3. what a plan runs, and how long it takes
    python -m experiments.run quality --seeds 0 1 2 --jobs 2
    python -m experiments.collect                 # 4. what is kept of the results
    python -m experiments.summary                 # 5. tables and figures

Everything goes below ``runs/experiments`` (``--out``); each command goes on where an interrupted one stopped. Run them
in the root of the repository, after `pip install -e ".[experiments]"`. What came out: docs/results/evidence.md.
"""
