"""What the student learns from the teacher: losses, grafting, and the teacher's part in a run."""
