(on request_headers
  (call $say @first@ (call $reply #403 @first@))
  (call $say @second@ (call $reply #404 @second@))
  #1)
