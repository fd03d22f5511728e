"""Settings files that come with the package."""
