"""Tables of README.md and docs/ from the JSON files under results/."""
