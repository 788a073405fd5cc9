"""What a run tells the world about itself."""
