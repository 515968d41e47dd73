"""Human feedback: rounds of images, votes on them, the page where people vote, and agreement."""
