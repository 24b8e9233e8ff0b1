"""What is measured of a trained policy: held-out pairs, sampled answers, the bound, answers for benchmarks' judges."""
