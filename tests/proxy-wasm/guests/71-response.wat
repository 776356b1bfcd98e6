(global $id (mut i32) #0)
(on response_headers
  (global.set $id (local.get $id))
  (call $say @call@ (call $fetch @auth@ %:method=GET;:path=/;:authority=auth%))
  #1)
(on http_call_response
  (call $say @enter@ (call $set_effective_context (global.get $id)))
  (call $say @add@ (call $add_header_map_value #2 @x-called@ @1@))
  (call $say @resume@ (call $continue_stream #1)))
