(global $id (mut i32) #0)
(on request_headers
  (global.set $id (local.get $id))
  (call $say @call@ (call $fetch @auth@ %:method=GET;:path=/;:authority=auth%))
  (call $say @reply@ (call $reply #403 @no@))
  #1)
(on delete (call $log @delete@))
(on http_call_response
  (call $show @answer@ (call $get_buffer_bytes #4 #0 #100 OUT))
  (call $say @enter@ (call $set_effective_context (global.get $id))))
