"""What of this package can work on this machine, tried rather than guessed."""
