"""Runs as jobs of Slurm: what is asked for is checked, rendered as an sbatch script that stands alone, and submitted. No torch."""
