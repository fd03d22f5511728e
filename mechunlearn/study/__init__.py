"""The Mechanistic Unlearning study (arXiv:2410.12949) as seeded, resumable runs: preset -> jobs -> tables -> claims."""
