"""The Mechanistic Unlearning study (arXiv:2410.12949) as seeded runs: presets -> jobs -> tables -> claims."""
