"""Who owns which page of latents, and how pages travel."""
