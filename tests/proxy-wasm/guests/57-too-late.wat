(on response_body
  (call $say @reply@ (call $reply #418 @local@))
  #0)
