# Sourced: pip, Ray and others keep files in the home folder; where there is none that can be written, one in the checkout.
if ! { [ -n "${HOME:-}" ] && [ -d "$HOME" ] && [ -w "$HOME" ]; }; then
  HOME="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.cache/home"
  export HOME
  mkdir -p "$HOME"
fi
