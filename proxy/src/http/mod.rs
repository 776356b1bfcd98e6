//! The path of a request: one [`serve`] per connection of a client, one exchange per request.

mod body;
mod respond;

pub use body::{ReplayBuffer, RequestBody, ResponseBody};
