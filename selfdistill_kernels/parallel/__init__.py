"""A vocabulary that lies in parts on several processes, and what they exchange."""
