"""What a run is deployed with, rendered to text: pure, without torch."""
