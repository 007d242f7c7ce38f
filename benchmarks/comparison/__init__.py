"""What benchmarks/compare_guidance.py is made of: arms, runs, what they found, and its report."""
