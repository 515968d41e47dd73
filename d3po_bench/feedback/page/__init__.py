"""The labelling page: sign-in, items to judge, and an overview for the admin."""
