//! A trained student compiled to a plan.
