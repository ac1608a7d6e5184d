"""What a user runs: one file a command, standing on all other floors."""
