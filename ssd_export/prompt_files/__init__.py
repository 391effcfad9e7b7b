"""Images for a file of prompts: in this process or on a Ray cluster, resumed where they stopped."""
